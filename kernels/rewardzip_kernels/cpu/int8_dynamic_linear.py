"""int8_dynamic_linear on a CPU: ``linear.py`` with rows quantised to bytes and exact int32 sums."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..int8_dynamic_linear import int8_dynamic_linear_reference
from .linear import linear, settled
from .packing import packed
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
    y = linear(Int8, x.float(), lambda: packed((weight,)), scale, bias, activation, x_scale, isa)
    if y is None:
        return int8_dynamic_linear_reference(x, weight, scale, bias, activation, x_scale)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _settled(weight: Tensor, *rest: Any) -> Callable[[Tensor], Tensor | None] | None:
    return settled(Int8, lambda weight: packed((weight,)), (weight,), *rest)


int8_dynamic_linear.settled = _settled  # type: ignore[attr-defined]
