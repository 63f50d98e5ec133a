"""int8_dynamic_linear on a CPU: ``linear.py`` with rows quantised to bytes and exact int32 sums."""

from functools import partial

import torch
from torch import Tensor

from ..int8_dynamic_linear import int8_dynamic_linear_reference
from .linear import linear, settled
from .tile import Int8


def int8_dynamic_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    x_scale: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    y = linear(Int8, x.float(), weight, scale, bias, activation, x_scale, isa)
    if y is None:
        return int8_dynamic_linear_reference(x, weight, scale, bias, activation, x_scale)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


int8_dynamic_linear.settled = partial(settled, Int8)  # type: ignore[attr-defined]
